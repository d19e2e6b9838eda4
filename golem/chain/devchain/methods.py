"""The dev chain's JSON-RPC methods: the eth_ ones a wallet needs, and dev methods under anvil's names.

The same test suite can so drive this chain and anvil. Unknown methods answer -32601, bad parameters -32602.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from typing import Any

from eth.constants import ZERO_ADDRESS
from eth.exceptions import BlockNotFound, HeaderNotFound
from eth.vm.spoof import SpoofTransaction

from golem.chain.devchain import client_version, genesis
from golem.chain.devchain.chain import ChainError, DevChain, hexed
from golem.chain.signer import checksum

PRIORITY_FEE = 10**9
LOG_LIMIT = 10_000
MINE_LIMIT = 10_000
HISTORY_LIMIT = 1_024
TIME_LIMIT_S = 10**9
BASE_FEE_LIMIT = 10**15
REVERT = bytes.fromhex("08c379a0")  # Error(string)
ESTIMATES = (64, 66, 70, 80, 100, 150, 250)  # 64ths of the gas used: a call may need more (63/64 rule, refunds)


def invalid(what: str) -> ChainError:
    return ChainError(f"invalid argument: {what}", -32602)


def number_of(value: Any) -> int:
    """A quantity: 0x-hex or a JSON integer."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise invalid(f"quantity expected, got {str(value)[:60]}")
    try:
        number = int(value, 16) if isinstance(value, str) else value
    except ValueError:
        raise invalid(f"quantity expected, got {str(value)[:60]}") from None
    if not 0 <= number < 2**256:
        raise invalid("quantity out of range")
    return number


def bytes_of(value: Any, length: int | None = None) -> bytes:
    """0x-hex data, of exactly `length` bytes where given."""
    if not isinstance(value, str) or not value.startswith("0x"):
        raise invalid(f"0x-hex expected, got {str(value)[:60]}")
    try:
        raw = bytes.fromhex(value[2:])
    except ValueError:
        raise invalid(f"0x-hex expected, got {value[:60]}") from None
    if length is not None and len(raw) != length:
        raise invalid(f"{length} bytes expected, got {len(raw)}")
    return raw


class Methods:
    """Dispatch by name to the functions of `chain`."""

    def __init__(self, chain: DevChain) -> None:
        self.chain = chain

    def call(self, method: str, params: list[Any]) -> Any:
        handler: Callable[..., Any] | None = getattr(self, "rpc_" + method, None)
        if handler is None:
            raise ChainError(f"the method {method[:80]} does not exist/is not available", -32601)
        try:
            bound = inspect.signature(handler).bind(*params)
        except TypeError as error:
            raise invalid(str(error)) from None
        return handler(*bound.args)

    # -- helpers

    def _header(self, tag: Any) -> Any:
        if tag in (None, "latest", "pending", "safe", "finalized"):
            return self.chain.head
        if isinstance(tag, dict):
            return self._header_by_hash(tag.get("blockHash")) if "blockHash" in tag else self._header(tag.get("blockNumber"))
        number = 0 if tag == "earliest" else number_of(tag)
        if number > self.chain.head.block_number:
            raise ChainError("header not found")
        return self.chain.chain.get_canonical_block_header_by_number(number)

    def _header_by_hash(self, block_hash: Any) -> Any:
        try:
            return self.chain.chain.get_block_header_by_hash(bytes_of(block_hash, 32))
        except (HeaderNotFound, BlockNotFound):
            raise ChainError("header not found") from None

    def _block(self, header: Any, full: bool) -> dict[str, Any]:
        txs = self.chain.chain.get_block_by_header(header).transactions
        return {
            "number": hex(header.block_number),
            "hash": hexed(header.hash),
            "parentHash": hexed(header.parent_hash),
            "timestamp": hex(header.timestamp),
            "gasLimit": hex(header.gas_limit),
            "gasUsed": hex(header.gas_used),
            "baseFeePerGas": hex(header.base_fee_per_gas),
            "miner": checksum(hexed(header.coinbase)),
            "difficulty": "0x0",
            "totalDifficulty": "0x0",
            "extraData": hexed(header.extra_data),
            "nonce": hexed(header.nonce),
            "mixHash": hexed(header.mix_hash),
            "size": "0x0",
            "stateRoot": hexed(header.state_root),
            "receiptsRoot": hexed(header.receipt_root),
            "transactionsRoot": hexed(header.transaction_root),
            "sha3Uncles": hexed(header.uncles_hash),
            "uncles": [],
            "logsBloom": f"0x{header.bloom:0512x}",
            "transactions": [self._tx(tx, header, i) if full else hexed(tx.hash) for i, tx in enumerate(txs)],
        }

    def _tx(self, tx: Any, header: Any, place: int | None) -> dict[str, Any]:
        return {
            "hash": hexed(tx.hash),
            "nonce": hex(tx.nonce),
            "blockHash": hexed(header.hash) if header else None,
            "blockNumber": hex(header.block_number) if header else None,
            "transactionIndex": None if place is None else hex(place),
            "from": checksum(hexed(tx.sender)),
            "to": checksum(hexed(tx.to)) if tx.to else None,
            "value": hex(tx.value),
            "gas": hex(tx.gas),
            "gasPrice": hex(tx.max_fee_per_gas),
            "maxFeePerGas": hex(tx.max_fee_per_gas),
            "maxPriorityFeePerGas": hex(tx.max_priority_fee_per_gas),
            "input": hexed(tx.data),
            "accessList": [],
            "type": hex(getattr(tx, "type_id", None) or 0),
            "chainId": hex(self.chain.chain_id),
            "v": hex(tx.y_parity),
            "r": hex(tx.r),
            "s": hex(tx.s),
        }

    def _execute(self, call: Any, tag: Any, gas: int | None = None) -> tuple[Any, Any]:
        """Run a call without committing. Returns (computation, transaction); ChainError 3 when it reverts."""
        if not isinstance(call, dict):
            raise invalid("a call object is expected")
        # no base fee, as geth does for eth_call: the caller need not hold ether
        header = self.chain.chain.create_header_from_parent(self._header(tag)).copy(base_fee_per_gas=0)
        vm: Any = self.chain.chain.get_vm(header)
        sender = bytes_of(call["from"], 20) if call.get("from") else ZERO_ADDRESS
        limit = number_of(call["gas"]) if call.get("gas") else header.gas_limit
        tx = vm.create_unsigned_transaction(
            nonce=vm.state.get_nonce(sender),
            gas_price=0,
            gas=min(gas or limit, header.gas_limit),
            to=bytes_of(call["to"], 20) if call.get("to") else b"",
            value=number_of(call.get("value") or 0),
            data=bytes_of(call.get("input") or call.get("data") or "0x"),
        )
        if vm.state.get_balance(sender) < tx.value:
            raise ChainError("insufficient funds for gas * price + value")
        done = vm.state.costless_execute_transaction(SpoofTransaction(tx, from_=sender))
        if done.is_error:
            output = bytes(done.output)
            if output[:4] == REVERT and len(output) >= 68:
                length = int.from_bytes(output[36:68], "big")
                reason = output[68 : 68 + min(length, 1_000)].decode(errors="replace")
                raise ChainError(f"execution reverted: {reason}", 3, hexed(output))
            if type(done.error).__name__ == "Revert":
                raise ChainError("execution reverted", 3, hexed(output))
            raise ChainError(f"execution failed: {type(done.error).__name__}", -32000)
        return done, tx

    # -- reading

    def rpc_web3_clientVersion(self) -> str:
        return client_version(os.getpid())

    def rpc_net_version(self) -> str:
        return str(self.chain.chain_id)

    def rpc_eth_chainId(self) -> str:
        return hex(self.chain.chain_id)

    def rpc_eth_syncing(self) -> bool:
        return False

    def rpc_eth_accounts(self) -> list[str]:
        return []

    def rpc_eth_blockNumber(self) -> str:
        return hex(self.chain.head.block_number)

    def rpc_eth_gasPrice(self) -> str:
        return hex(self.chain.next_header().base_fee_per_gas + PRIORITY_FEE)

    def rpc_eth_maxPriorityFeePerGas(self) -> str:
        return hex(PRIORITY_FEE)

    def rpc_eth_getBalance(self, address: Any, tag: Any = "latest") -> str:
        return hex(self.chain.state(self._header(tag)).get_balance(bytes_of(address, 20)))

    def rpc_eth_getCode(self, address: Any, tag: Any = "latest") -> str:
        return hexed(self.chain.state(self._header(tag)).get_code(bytes_of(address, 20)))

    def rpc_eth_getStorageAt(self, address: Any, slot: Any, tag: Any = "latest") -> str:
        value = self.chain.state(self._header(tag)).get_storage(bytes_of(address, 20), number_of(slot))
        return f"0x{value:064x}"

    def rpc_eth_getTransactionCount(self, address: Any, tag: Any = "latest") -> str:
        sender = bytes_of(address, 20)
        if tag == "pending":
            return hex(self.chain.pending_nonce(sender))
        return hex(self.chain.state(self._header(tag)).get_nonce(sender))

    def rpc_eth_feeHistory(self, count: Any, tag: Any = "latest", percentiles: Any = None) -> dict[str, Any]:
        last, wanted = self._header(tag), min(number_of(count), HISTORY_LIMIT)
        first = max(0, last.block_number - wanted + 1)
        chain = self.chain.chain
        headers = [chain.get_canonical_block_header_by_number(n) for n in range(first, last.block_number + 1)]
        fees = [*headers, chain.create_header_from_parent(last)]
        rewards = len(percentiles) if isinstance(percentiles, list) else 0
        return {
            "oldestBlock": hex(first),
            "baseFeePerGas": [hex(header.base_fee_per_gas) for header in fees],
            "gasUsedRatio": [header.gas_used / header.gas_limit for header in headers],
            "reward": [[hex(PRIORITY_FEE)] * rewards for _ in headers],
        }

    def rpc_eth_call(self, call: Any, tag: Any = "latest") -> str:
        return hexed(self._execute(call, tag)[0].output)

    def rpc_eth_estimateGas(self, call: Any, tag: Any = "latest") -> str:
        done, tx = self._execute(call, tag)
        used = tx.intrinsic_gas + done.get_gas_used()
        for part in ESTIMATES:
            gas = min(max(used * part // 64, 21_000), genesis.GAS_LIMIT)
            try:
                self._execute(call, tag, gas)
            except ChainError:
                continue
            return hex(gas)
        return hex(genesis.GAS_LIMIT)

    def rpc_eth_getTransactionReceipt(self, tx_hash: Any) -> Any:
        text = self.chain.store.receipt(bytes_of(tx_hash, 32))
        return json.loads(text) if text else None

    def rpc_eth_getTransactionByHash(self, tx_hash: Any) -> Any:
        wanted = bytes_of(tx_hash, 32)
        if place := self.chain.store.place(wanted):
            header = self.chain.chain.get_canonical_block_header_by_number(place[0])
            return self._tx(self.chain.chain.get_block_by_header(header).transactions[place[1]], header, place[1])
        for slot in self.chain.pool.values():
            for tx in slot.values():
                if tx.hash == wanted:
                    return self._tx(tx, None, None)
        return None

    def rpc_eth_getBlockByNumber(self, tag: Any, full: Any = False) -> Any:
        try:
            return self._block(self._header(tag), bool(full))
        except ChainError as error:
            if error.code == -32602:
                raise
            return None

    def rpc_eth_getBlockByHash(self, block_hash: Any, full: Any = False) -> Any:
        try:
            return self._block(self._header_by_hash(block_hash), bool(full))
        except ChainError as error:
            if error.code == -32602:
                raise
            return None

    def rpc_eth_getLogs(self, wanted: Any) -> list[Any]:
        if not isinstance(wanted, dict):
            raise invalid("a filter object is expected")
        if wanted.get("blockHash"):
            first = last = self._header_by_hash(wanted["blockHash"]).block_number
        else:
            first = self._header(wanted.get("fromBlock")).block_number
            last = self._header(wanted.get("toBlock")).block_number
        each = wanted.get("topics") or []
        if not isinstance(each, list) or len(each) > 4:
            raise invalid("at most four topics")
        topics = [[bytes_of(one, 32) for one in _listed(topic)] for topic in each]
        addresses = [bytes_of(one, 20) for one in _listed(wanted.get("address"))]
        bodies = self.chain.store.logs(first, last, addresses, topics, LOG_LIMIT + 1)
        if len(bodies) > LOG_LIMIT:
            raise ChainError(f"query returned more than {LOG_LIMIT} results", -32005)
        return [json.loads(body) for body in bodies]

    def rpc_txpool_status(self) -> dict[str, str]:
        ready = len(self.chain.ready())
        return {"pending": hex(ready), "queued": hex(sum(map(len, self.chain.pool.values())) - ready)}

    # -- writing

    def rpc_eth_sendRawTransaction(self, raw: Any) -> str:
        return hexed(self.chain.add(bytes_of(raw)))

    def rpc_dev_faucet(self, address: Any, amount: Any = genesis.FAUCET_GIFT_WEI) -> str:
        amount_wei = number_of(amount)
        if amount_wei > genesis.FAUCET_GIFT_WEI:
            raise invalid(f"the faucet gives at most {genesis.FAUCET_GIFT_WEI} wei")
        return hexed(self.chain.faucet(bytes_of(address, 20), amount_wei))

    # -- the developer's hand, by anvil's names

    def rpc_evm_mine(self, options: Any = None) -> str:
        self.chain.mine(empty=True)
        return "0x0"

    def rpc_anvil_mine(self, count: Any = 1, interval: Any = None) -> None:
        blocks = number_of(count)
        if blocks > MINE_LIMIT:
            raise invalid(f"at most {MINE_LIMIT} blocks at once")
        for _ in range(blocks):
            self.chain.mine(empty=True)

    def rpc_evm_setAutomine(self, on: Any) -> bool:
        self.chain.automine = bool(on)
        if on:
            self.chain.interval_s = 0.0
            self.chain.mine()
        return True

    def rpc_evm_setIntervalMining(self, seconds: Any) -> bool:
        """Mine at a period instead of at once; 0 stops that (and leaves mining to evm_mine or evm_setAutomine)."""
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 3600:
            raise invalid("seconds between 0 and 3600")
        self.chain.interval_s, self.chain.automine = float(seconds), False
        return True

    def rpc_evm_increaseTime(self, seconds: Any) -> str:
        offset = self.chain.time_offset + number_of(seconds)
        if offset > TIME_LIMIT_S:
            raise invalid(f"at most {TIME_LIMIT_S} seconds ahead")
        self.chain.time_offset = offset
        return hex(self.chain.time_offset)

    def rpc_evm_snapshot(self) -> str:
        return hex(self.chain.snapshot())

    def rpc_evm_revert(self, snapshot: Any) -> bool:
        return self.chain.revert(number_of(snapshot))

    def rpc_anvil_dropTransaction(self, tx_hash: Any) -> str | None:
        return tx_hash if self.chain.drop(bytes_of(tx_hash, 32)) else None

    def rpc_anvil_dropAllTransactions(self) -> None:
        self.chain.drop(None)

    def rpc_anvil_reorg(self, depth: Any, transactions: Any = ()) -> None:
        if transactions:
            raise invalid("transactions for the new branch are not supported")
        self.chain.reorg(number_of(depth))

    def rpc_anvil_setNextBlockBaseFeePerGas(self, fee: Any) -> None:
        wei = number_of(fee)
        if wei > BASE_FEE_LIMIT:
            raise invalid(f"at most {BASE_FEE_LIMIT} wei")
        self.chain.next_base_fee = wei


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
