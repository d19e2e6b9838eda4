"""Finding nodes of our network on the LAN by mDNS, in the form of libp2p's specification (dnsaddr TXT records).

zeroconf works in threads of its own: what it finds is handed over to Trio through the token. Only concrete addresses
are announced. Neighbour: `network.py` puts what is found in the address book and meets the peers.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable

import trio
import zeroconf

from golem.net.peerid import split_address

log = logging.getLogger(__name__)

SERVICE = "_p2p._udp.local."
MAX_FOUND_ADDRESSES = 16
MAX_FOUND = 256  # finds that wait to be looked at
TTL_S = 120
STOP_TIMEOUT_S = 0.7
LOOKUP_TIMEOUT_MS = 2000


class Mdns:
    """Announces us and reports others as (peer id, [address]) by a callback in the Trio thread."""

    def __init__(self, network: str, peer_id: str, addresses: list[str], on_found: Callable[[str, list[str]], None]) -> None:
        self._network = network
        self._peer_id = peer_id
        self._addresses = addresses
        self._on_found = on_found
        self._name = f"{peer_id}-{network}"[:63] + "." + SERVICE

    async def run(self) -> None:
        """Until cancelled. A machine without a usable network is logged, not raised: mDNS is a convenience."""
        token = trio.lowlevel.current_trio_token()
        running: list[zeroconf.Zeroconf] = []
        sender, receiver = trio.open_memory_channel[tuple[str, list[str]]](MAX_FOUND)

        def hand_over(peer_id: str, addresses: list[str]) -> None:  # an exception in here would end the process
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
                sender.send_nowait((peer_id, addresses))

        def found(peer_id: str, addresses: list[str]) -> None:  # runs in a thread of zeroconf
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(hand_over, peer_id, addresses)

        def changed(zeroconf: zeroconf.Zeroconf, service_type: str, name: str, state_change: zeroconf.ServiceStateChange) -> None:
            if state_change.name != "Removed" and name != self._name:
                info = zeroconf.get_service_info(service_type, name, LOOKUP_TIMEOUT_MS)
                if info is not None:
                    self._report(info.properties, found)

        stopped = False

        def start() -> None:
            instance = zeroconf.Zeroconf()
            running.append(instance)
            zeroconf.ServiceBrowser(instance, SERVICE, handlers=[changed])
            instance.register_service(self._info(), cooperating_responders=True)
            if stopped:  # cancelled meanwhile: nobody else will close it
                instance.close()

        def stop() -> None:
            for instance in running:
                instance.close()

        try:
            await trio.to_thread.run_sync(start, abandon_on_cancel=True)
            async for peer_id, addresses in receiver:
                self._on_found(peer_id, addresses)
        except (OSError, zeroconf.Error) as error:
            log.warning("no discovery by mDNS: %s", error)
        finally:
            stopped = True
            receiver.close()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_TIMEOUT_S):
                await trio.to_thread.run_sync(stop, abandon_on_cancel=True)

    def _info(self) -> zeroconf.ServiceInfo:
        properties: dict[str | bytes, str | bytes | None] = {"net": self._network}
        for number, address in enumerate(self._addresses[:MAX_FOUND_ADDRESSES]):
            properties["dnsaddr" if number == 0 else f"dnsaddr{number + 1}"] = f"{address}/p2p/{self._peer_id}"
        ips = [address.split("/")[2] for address in self._addresses if address.startswith("/ip4/")]
        port = int(self._addresses[0].split("/")[4]) if self._addresses else 0
        return zeroconf.ServiceInfo(
            SERVICE,
            self._name,
            port,
            properties=properties,
            server=f"{self._peer_id}.local.",
            addresses=[socket.inet_aton(ip) for ip in dict.fromkeys(ips)],
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )

    def _report(self, properties: dict[bytes, bytes | None], found: Callable[[str, list[str]], None]) -> None:
        """Anybody on the LAN may announce anything: keep what is a dialable address of one secp256k1 peer."""
        if properties.get(b"net") != self._network.encode():
            return
        addresses: dict[str, list[str]] = {}
        for key, value in list(properties.items())[: 2 * MAX_FOUND_ADDRESSES]:
            if key.startswith(b"dnsaddr") and value is not None:
                try:
                    address, peer_id = split_address(value.decode())
                except ValueError as error:
                    log.debug("an unusable announcement: %s", error)
                    continue
                addresses.setdefault(peer_id, []).append(address)
        for peer_id, known in addresses.items():
            if peer_id != self._peer_id:
                found(peer_id, known)
