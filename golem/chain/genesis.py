"""Which chain is it? Two of one id are told apart by their first block: a dev chain made anew, a URL of somebody else's."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from golem.chain.draft import Wait
from golem.chain.evidence import Evidence, Story, Unclear, Witness, silence
from golem.chain.networks import Network
from golem.chain.problem import Problem
from golem.chain.rpc import Rpc, RpcError
from golem.chain.store import Store


async def check_genesis(evidence: Evidence, rpc: Rpc, store: Store, network: Network, address: str) -> tuple[list[Problem], bool]:
    """Is this the chain that our rows are about? RPCs that serve another one are not used; their problems, and whether
    all is well for good. `Wait` when nobody serves ours, `Unclear` or RpcError when nobody can tell.
    """
    said, silent = await _asked(evidence, rpc)
    if not said:
        raise silence(network, silent)
    stories = [Story(witness.name, f"genesis {genesis[:18]}...") for witness, genesis in said]
    hashes = {genesis for _, genesis in said}
    if len(hashes) > 1 and not store.ever_signed():
        _ask_anew(said)
        raise Unclear(stories, contradiction=True)
    known = store.bind_genesis(network.chain, min(hashes))
    if known in hashes:
        problems = []
        for witness, genesis in said:
            witness.endpoint.stranger = genesis != known
            if witness.endpoint.stranger:
                text = f"{witness.name} serves another chain of the same id, genesis {genesis[:18]}...: it is not used"
                problems.append(Problem("InvalidChainId", text, address, chain_id=network.chain_id))
        return problems, len(hashes) == 1 and not silent
    text = ""
    if silent or len(hashes) > 1:  # those that are silent may be the ones that know our chain
        text = f"no RPC that answers serves the chain {known[:18]}...: " + "; ".join(map(": ".join, stories))
    elif not network.dev_faucet and store.ever_signed():
        text = f"the chain behind {network.name} was replaced by another one: its genesis is {min(hashes)[:18]}..., "
        text += f"the payments in this node's chain.db were made on {known[:18]}..."
    if text:
        _ask_anew(said)
        raise Wait(Problem("InvalidChainId", text, address, chain_id=network.chain_id))
    store.change_chain(network.chain, min(hashes))  # play money of a chain that is gone: begin again
    return [], True


def _ask_anew(said: Sequence[tuple[Witness, str]]) -> None:
    """Believe nobody for good while nothing is decided: who was wrong may be mended without ever failing."""
    for witness, _ in said:
        witness.endpoint.genesis = ""


async def _asked(evidence: Evidence, rpc: Rpc) -> tuple[list[tuple[Witness, str]], list[tuple[Witness, RpcError]]]:
    """What each RPC says; one that has not failed since it said so is not asked again, one that rests is left alone."""
    witnesses, now = evidence.witnesses(), trio.current_time()
    known = [each for each in witnesses if each.endpoint.genesis and not each.endpoint.stranger]
    others = [each for each in witnesses if each not in known]
    awake = [each for each in others if each.endpoint.rests_until <= now] or ([] if known else others)
    said, silent = await evidence.each(awake, lambda each: each.ask(rpc.genesis_hash))
    for witness, genesis in said:
        witness.endpoint.genesis = genesis
    resting = [(each, RpcError(each.endpoint.trouble, "down")) for each in others if each not in awake]
    return [*((each, each.endpoint.genesis) for each in known), *said], [*silent, *resting]
