# pragma version ~=0.4.3
# pragma evm-version cancun
"""
@title  Many token transfers in one transaction
@notice The packed calls of the multi-transfer contracts on the public networks, same ABI: one payment is one word,
        20 bytes of payee address followed by 12 bytes of amount in wei. The caller must have approved this contract.
"""

interface Token:
    def transfer(receiver: address, amount: uint256) -> bool: nonpayable
    def transferFrom(sender: address, receiver: address, amount: uint256) -> bool: nonpayable

MAX_PAYMENTS: constant(uint256) = 500
AMOUNT_MASK: constant(uint256) = 2**96 - 1

GLM: public(immutable(address))


@deploy
def __init__(token: address):
    GLM = token


@external
def golemTransferDirectPacked(payments: DynArray[bytes32, MAX_PAYMENTS]):
    """
    @notice Each payment goes straight from the caller to its payee, so each Transfer log names the true payer.
    """
    for payment: bytes32 in payments:
        word: uint256 = convert(payment, uint256)
        payee: address = convert(word >> 96, address)
        assert extcall Token(GLM).transferFrom(msg.sender, payee, word & AMOUNT_MASK), "transferFrom failed"


@external
def golemTransferIndirectPacked(payments: DynArray[bytes32, MAX_PAYMENTS], total: uint256):
    """
    @notice The total comes here first and goes on from here; the Transfer logs then name this contract as sender.
    """
    assert extcall Token(GLM).transferFrom(msg.sender, self, total), "transferFrom failed"
    paid: uint256 = 0
    for payment: bytes32 in payments:
        word: uint256 = convert(payment, uint256)
        amount: uint256 = word & AMOUNT_MASK
        paid += amount
        assert extcall Token(GLM).transfer(convert(word >> 96, address), amount), "transfer failed"
    assert paid == total, "Amount sum not equal totalTransferred"
