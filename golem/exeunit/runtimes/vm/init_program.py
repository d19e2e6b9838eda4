"""Tiny programs for containers, made here instruction by instruction: an image need not hold anything of its own.

`init_program` is process 1 of every container. It does nothing but be there: children of dead commands that fall to it
vanish by themselves (it ignores SIGCHLD), and it ends at a SIGTERM from outside the container; the guest cannot end it.
`probe_program` tries, inside a container, what must not work there; the runtime's self-test reads its exit status.
`relay_program` becomes a program whose arguments stand in a file (`long_arguments`), as its own are too few for them.
All are static ELF files of a few hundred bytes without libraries, for x86-64 and aarch64. Every line of a listing has
its assembly text beside it.
Neighbours: `golem.exeunit.runtimes.vm.runtime` binds them into containers.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

# Exit statuses of the probe. A call of the i386 table may also be answered by SIGSYS, which is as good as 0.
PROBE_TEXT = b"golem\n"
PROBE_CLOSED, PROBE_VSOCK, PROBE_IO_URING, PROBE_I386 = 0, 1, 2, 4

RELAY_BASE, RELAY_BYTES = 0x10_0000_0000, 2 << 20  # where the file of arguments is mapped, and the most of it
RELAY_BROKEN, RELAY_CANNOT, RELAY_NOWHERE = 125, 126, 127

_BASE = 0x400000
_ALIGN = 0x10000  # the largest page of either machine
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_MACHINES = {"x86_64": 62, "aarch64": 183}


@dataclass(frozen=True)
class _At:
    """A name for the place of the next line."""

    label: str


@dataclass(frozen=True)
class _To:
    """An instruction that names a place; `form` says how the distance goes in."""

    form: str  # "rel8", "rel32": behind the opcode; "adr", "branch": into bits 5 to 23 of the word
    opcode: bytes
    label: str

    @property
    def size(self) -> int:
        return len(self.opcode) + {"rel8": 1, "rel32": 4}.get(self.form, 0)


_Line = bytes | _At | _To


def _x(text: str) -> bytes:
    return bytes.fromhex(text)


def _w(word: int) -> bytes:
    return struct.pack("<I", word)


# -- x86-64: number of the call in eax, arguments in rdi, rsi, rdx, r10; calls change rax, rcx and r11 alone

_INIT_X86_64: tuple[_Line, ...] = (
    # rt_sigaction(SIGCHLD, &ignore, NULL, 8)
    _x("b8 0d 00 00 00"),                       # mov eax, 13
    _x("bf 11 00 00 00"),                       # mov edi, 17
    _To("rel32", _x("48 8d 35"), "ignore"),     # lea rsi, [rip + ignore]
    _x("31 d2"),                                # xor edx, edx
    _x("41 ba 08 00 00 00"),                    # mov r10d, 8
    _x("0f 05"),                                # syscall
    # rt_sigprocmask(SIG_BLOCK, &terminate, NULL, 8)
    _x("b8 0e 00 00 00"),                       # mov eax, 14
    _x("31 ff"),                                # xor edi, edi
    _To("rel32", _x("48 8d 35"), "terminate"),  # lea rsi, [rip + terminate]
    _x("0f 05"),                                # syscall
    # rt_sigtimedwait(&terminate, &info, NULL, 8), for ever
    _At("wait"),
    _x("b8 80 00 00 00"),                       # mov eax, 128
    _To("rel32", _x("48 8d 3d"), "terminate"),  # lea rdi, [rip + terminate]
    _x("48 8d 74 24 80"),                       # lea rsi, [rsp - 128]
    _x("0f 05"),                                # syscall
    _x("83 f8 0f"),                             # cmp eax, 15        SIGTERM?
    _To("rel8", _x("75"), "wait"),              # jne wait
    _x("83 7e 08 00"),                          # cmp dword [rsi + 8], 0     info.si_code: by kill(2)?
    _To("rel8", _x("75"), "wait"),              # jne wait
    _x("83 7e 10 00"),                          # cmp dword [rsi + 16], 0    info.si_pid: from outside?
    _To("rel8", _x("75"), "wait"),              # jne wait
    # exit_group(0)
    _x("b8 e7 00 00 00"),                       # mov eax, 231
    _x("31 ff"),                                # xor edi, edi
    _x("0f 05"),                                # syscall
    _At("terminate"),                           # a signal set: SIGTERM
    struct.pack("<Q", 1 << 14),
    _At("ignore"),                              # a struct sigaction: SIG_IGN, no flags, no restorer, empty mask
    struct.pack("<QQQQ", 1, 0, 0, 0),
)  # fmt: skip

_PROBE_X86_64: tuple[_Line, ...] = (
    # write(1, text, 6)
    _x("b8 01 00 00 00"),                       # mov eax, 1
    _x("bf 01 00 00 00"),                       # mov edi, 1
    _To("rel32", _x("48 8d 35"), "text"),       # lea rsi, [rip + text]
    _x("ba 06 00 00 00"),                       # mov edx, 6
    _x("0f 05"),                                # syscall
    # socket(AF_VSOCK, SOCK_STREAM, 0) must fail
    _x("b8 29 00 00 00"),                       # mov eax, 41
    _x("bf 28 00 00 00"),                       # mov edi, 40
    _x("be 01 00 00 00"),                       # mov esi, 1
    _x("31 d2"),                                # xor edx, edx
    _x("0f 05"),                                # syscall
    _x("bf 01 00 00 00"),                       # mov edi, 1         PROBE_VSOCK
    _x("48 85 c0"),                             # test rax, rax
    _To("rel8", _x("79"), "exit"),              # jns exit
    # io_uring_setup(1, &params) must be refused before it looks at anything
    _x("b8 a9 01 00 00"),                       # mov eax, 425
    _x("bf 01 00 00 00"),                       # mov edi, 1
    _x("48 8d 74 24 80"),                       # lea rsi, [rsp - 128]
    _x("0f 05"),                                # syscall
    _x("bf 02 00 00 00"),                       # mov edi, 2         PROBE_IO_URING
    _x("48 83 f8 ff"),                          # cmp rax, -1        EPERM
    _To("rel8", _x("74"), "i386"),              # je i386
    _x("48 83 f8 da"),                          # cmp rax, -38       ENOSYS
    _To("rel8", _x("75"), "exit"),              # jne exit
    # getpid() of the i386 table must not be answered
    _At("i386"),
    _x("b8 14 00 00 00"),                       # mov eax, 20
    _x("cd 80"),                                # int 0x80
    _x("bf 04 00 00 00"),                       # mov edi, 4         PROBE_I386
    _x("85 c0"),                                # test eax, eax
    _To("rel8", _x("79"), "exit"),              # jns exit
    _x("31 ff"),                                # xor edi, edi       PROBE_CLOSED
    # exit_group(edi)
    _At("exit"),
    _x("b8 e7 00 00 00"),                       # mov eax, 231
    _x("0f 05"),                                # syscall
    _At("text"),
    PROBE_TEXT,
)  # fmt: skip

_RELAY_X86_64: tuple[_Line, ...] = (
    # openat(AT_FDCWD, argv[1], O_CLOEXEC)
    _x("b8 01 01 00 00"),                       # mov eax, 257
    _x("bf 9c ff ff ff"),                       # mov edi, -100
    _x("48 8b 74 24 10"),                       # mov rsi, [rsp + 16]
    _x("ba 00 00 08 00"),                       # mov edx, 0x80000
    _x("0f 05"),                                # syscall
    _x("85 c0"),                                # test eax, eax
    _To("rel8", _x("78"), "broken"),            # js broken
    # mmap(base, size, PROT_READ, MAP_PRIVATE | MAP_FIXED, it, 0)
    _x("41 89 c0"),                             # mov r8d, eax
    _x("b8 09 00 00 00"),                       # mov eax, 9
    _x("48 bf") + struct.pack("<Q", RELAY_BASE),  # mov rdi, base
    _x("be") + struct.pack("<I", RELAY_BYTES),  # mov esi, size
    _x("ba 01 00 00 00"),                       # mov edx, 1
    _x("41 ba 12 00 00 00"),                    # mov r10d, 0x12
    _x("45 31 c9"),                             # xor r9d, r9d
    _x("0f 05"),                                # syscall
    _x("48 85 c0"),                             # test rax, rax
    _To("rel8", _x("78"), "broken"),            # js broken
    _x("49 89 c5"),                             # mov r13, rax
    _x("48 8d 58 08"),                          # lea rbx, [rax + 8]
    _x("41 bc 7f 00 00 00"),                    # mov r12d, 127      RELAY_NOWHERE
    # execve(each path in turn, argv of the file, envp)
    _At("next"),
    _x("48 8b 3b"),                             # mov rdi, [rbx]
    _x("48 83 c3 08"),                          # add rbx, 8
    _x("48 85 ff"),                             # test rdi, rdi
    _To("rel8", _x("74"), "exit"),              # jz exit
    _x("49 8b 75 00"),                          # mov rsi, [r13]
    _x("48 8d 54 24 20"),                       # lea rdx, [rsp + 32]
    _x("b8 3b 00 00 00"),                       # mov eax, 59
    _x("0f 05"),                                # syscall
    _x("83 f8 fe"),                             # cmp eax, -2        ENOENT
    _To("rel8", _x("74"), "next"),              # je next
    _x("83 f8 ec"),                             # cmp eax, -20       ENOTDIR
    _To("rel8", _x("74"), "next"),              # je next
    _x("41 bc 7e 00 00 00"),                    # mov r12d, 126      RELAY_CANNOT
    _To("rel8", _x("eb"), "next"),              # jmp next
    _At("broken"),
    _x("41 bc 7d 00 00 00"),                    # mov r12d, 125      RELAY_BROKEN
    # exit_group(r12d)
    _At("exit"),
    _x("44 89 e7"),                             # mov edi, r12d
    _x("b8 e7 00 00 00"),                       # mov eax, 231
    _x("0f 05"),                                # syscall
)  # fmt: skip

# -- aarch64: number of the call in x8, arguments in x0 to x3; calls change x0 alone


def _mov(register: int, value: int) -> bytes:
    """Assemble `mov x<register>, #value`."""
    return _w(0xD2800000 | value << 5 | register)


_SVC = _w(0xD4000001)  # svc #0

_INIT_AARCH64: tuple[_Line, ...] = (
    # rt_sigaction(SIGCHLD, &ignore, NULL, 8)
    _mov(8, 134),
    _mov(0, 17),
    _To("adr", _w(0x10000001), "ignore"),       # adr x1, ignore
    _mov(2, 0),
    _mov(3, 8),
    _SVC,
    # rt_sigprocmask(SIG_BLOCK, &terminate, NULL, 8)
    _mov(8, 135),
    _mov(0, 0),
    _To("adr", _w(0x10000001), "terminate"),    # adr x1, terminate
    _SVC,
    # rt_sigtimedwait(&terminate, &info, NULL, 8), for ever
    _At("wait"),
    _mov(8, 137),
    _To("adr", _w(0x10000000), "terminate"),    # adr x0, terminate
    _w(0xD10203E1),                             # sub x1, sp, #128
    _SVC,
    _w(0x71003C1F),                             # cmp w0, #15
    _To("branch", _w(0x54000001), "wait"),      # b.ne wait
    _w(0xB9400824),                             # ldr w4, [x1, #8]
    _To("branch", _w(0x35000004), "wait"),      # cbnz w4, wait
    _w(0xB9401024),                             # ldr w4, [x1, #16]
    _To("branch", _w(0x35000004), "wait"),      # cbnz w4, wait
    # exit_group(0)
    _mov(8, 94),
    _mov(0, 0),
    _SVC,
    _At("terminate"),
    struct.pack("<Q", 1 << 14),
    _At("ignore"),
    struct.pack("<QQQQ", 1, 0, 0, 0),
)  # fmt: skip

_PROBE_AARCH64: tuple[_Line, ...] = (
    # write(1, text, 6)
    _mov(8, 64),
    _mov(0, 1),
    _To("adr", _w(0x10000001), "text"),         # adr x1, text
    _mov(2, 6),
    _SVC,
    # socket(AF_VSOCK, SOCK_STREAM, 0) must fail
    _mov(8, 198),
    _mov(0, 40),
    _mov(1, 1),
    _mov(2, 0),
    _SVC,
    _mov(4, PROBE_VSOCK),
    _To("branch", _w(0x36F80000), "exit"),      # tbz w0, #31, exit      (an error is negative)
    # io_uring_setup(1, &params) must be refused before it looks at anything
    _mov(8, 425),
    _mov(0, 1),
    _w(0xD10203E1),                             # sub x1, sp, #128
    _SVC,
    _mov(4, PROBE_CLOSED),
    _w(0x3100041F),                             # cmn w0, #1             EPERM
    _To("branch", _w(0x54000000), "exit"),      # b.eq exit
    _w(0x3100981F),                             # cmn w0, #38            ENOSYS
    _To("branch", _w(0x54000000), "exit"),      # b.eq exit
    _mov(4, PROBE_IO_URING),
    # exit_group(x4)
    _At("exit"),
    _mov(8, 94),
    _w(0xAA0403E0),                             # mov x0, x4
    _SVC,
    _At("text"),
    PROBE_TEXT,
)  # fmt: skip

_RELAY_AARCH64: tuple[_Line, ...] = (
    _w(0x92800C60),                             # mov x0, #-100
    _w(0xF9400BE1),                             # ldr x1, [sp, #16]
    _w(0xD2A00102),                             # mov x2, #0x80000
    _mov(8, 56),                                # openat
    _SVC,
    _To("branch", _w(0x37F80000), "broken"),    # tbnz w0, #31, broken
    _w(0xAA0003E4),                             # mov x4, x0
    _w(0xD2C00000 | (RELAY_BASE >> 32) << 5),   # mov x0, base
    _w(0xD2A00001 | (RELAY_BYTES >> 16) << 5),  # mov x1, size
    _mov(2, 1),
    _mov(3, 0x12),
    _mov(5, 0),
    _mov(8, 222),                               # mmap
    _SVC,
    _To("branch", _w(0x37F80000), "broken"),    # tbnz w0, #31, broken   (no bit of the base)
    _w(0xAA0003F3),                             # mov x19, x0
    _w(0x91002274),                             # add x20, x19, #8
    _mov(21, RELAY_NOWHERE),
    _At("next"),
    _w(0xF8408680),                             # ldr x0, [x20], #8
    _To("branch", _w(0xB4000000), "exit"),      # cbz x0, exit
    _w(0xF9400261),                             # ldr x1, [x19]
    _w(0x910083E2),                             # add x2, sp, #32
    _mov(8, 221),                               # execve
    _SVC,
    _w(0x3100081F),                             # cmn w0, #2             ENOENT
    _To("branch", _w(0x54000000), "next"),      # b.eq next
    _w(0x3100501F),                             # cmn w0, #20            ENOTDIR
    _To("branch", _w(0x54000000), "next"),      # b.eq next
    _mov(21, RELAY_CANNOT),
    _To("branch", _w(0xB5000008), "next"),      # cbnz x8, next          (always)
    _At("broken"),
    _mov(21, RELAY_BROKEN),
    _At("exit"),
    _w(0xAA1503E0),                             # mov x0, x21
    _mov(8, 94),
    _SVC,
)  # fmt: skip

_LISTINGS = {
    "x86_64": (_INIT_X86_64, _PROBE_X86_64, _RELAY_X86_64),
    "aarch64": (_INIT_AARCH64, _PROBE_AARCH64, _RELAY_AARCH64),
}


def supported(machine: str | None = None) -> bool:
    """Whether there are programs for a machine (as `uname -m` calls it; this one if not said)."""
    return (machine or platform.machine()) in _LISTINGS


@cache
def init_program(machine: str | None = None) -> bytes:
    """Return the file of process 1. Raises KeyError for a machine that is not `supported`."""
    machine = machine or platform.machine()
    return _elf(_assemble(_LISTINGS[machine][0]), _MACHINES[machine])


@cache
def probe_program(machine: str | None = None) -> bytes:
    """Return the file of the self-test's program. Raises KeyError for a machine that is not `supported`."""
    machine = machine or platform.machine()
    return _elf(_assemble(_LISTINGS[machine][1]), _MACHINES[machine])


@cache
def relay_program(machine: str | None = None) -> bytes:
    """Return the file of the program that takes its arguments from a file. Raises KeyError as the others."""
    machine = machine or platform.machine()
    return _elf(_assemble(_LISTINGS[machine][2]), _MACHINES[machine])


def _assemble(lines: Sequence[_Line]) -> bytes:
    places, position = {}, 0
    for line in lines:
        if isinstance(line, _At):
            places[line.label] = position
        else:
            position += line.size if isinstance(line, _To) else len(line)
    code = bytearray()
    for line in lines:
        if isinstance(line, bytes):
            code += line
        elif isinstance(line, _To):
            code += _reference(line, places[line.label], len(code))
    return bytes(code)


def _reference(line: _To, target: int, here: int) -> bytes:
    if line.form in ("rel8", "rel32"):  # counted from the end of the instruction
        return line.opcode + struct.pack("<b" if line.form == "rel8" else "<i", target - here - line.size)
    distance = target - here
    (word,) = struct.unpack("<I", line.opcode)
    if line.form == "adr":  # in bytes; the two lowest bits go to 29 and 30
        return _w(word | (distance & 3) << 29 | (distance >> 2 & 0x7FFFF) << 5)
    bits = 14 if word & 0x7E000000 == 0x36000000 else 19  # tbz has less room than b.cond and cbnz
    return _w(word | (distance >> 2 & (1 << bits) - 1) << 5)


def _elf(code: bytes, machine: int) -> bytes:
    """Put a file around code that is loaded and run as a whole: header, one segment, code."""
    start = _HEADER.size + _SEGMENT.size
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bit, little endian, version 1
    header = _HEADER.pack(ident, 2, machine, 1, _BASE + start, _HEADER.size, 0, 0, _HEADER.size, _SEGMENT.size, 1, 64, 0, 0)
    size = start + len(code)
    segment = _SEGMENT.pack(1, 5, 0, _BASE, _BASE, size, size, _ALIGN)  # PT_LOAD, read and execute
    return header + segment + code
