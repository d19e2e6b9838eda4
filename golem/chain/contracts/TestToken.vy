# pragma version ~=0.4.3
# pragma evm-version cancun
"""
@title  tGLM: the test token of the local chain
@notice ERC-20 with EIP-2612 permit and a public, capped `create()` that stands for a faucet. Play money: worth nothing.
"""

event Transfer:
    sender: indexed(address)
    receiver: indexed(address)
    value: uint256

event Approval:
    owner: indexed(address)
    spender: indexed(address)
    value: uint256

name: public(String[32])
symbol: public(String[8])
decimals: public(constant(uint8)) = 18
totalSupply: public(uint256)
balanceOf: public(HashMap[address, uint256])
allowance: public(HashMap[address, HashMap[address, uint256]])

# one `create()` mints this much, and only to holders of less than this much
MINT_CAP: public(immutable(uint256))

nonces: public(HashMap[address, uint256])
DOMAIN_SEPARATOR: public(immutable(bytes32))
DOMAIN_TYPE: constant(bytes32) = keccak256(
    "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)
PERMIT_TYPE: constant(bytes32) = keccak256(
    "Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"
)


@deploy
def __init__(token_name: String[32], token_symbol: String[8], mint_cap: uint256):
    self.name = token_name
    self.symbol = token_symbol
    MINT_CAP = mint_cap
    DOMAIN_SEPARATOR = keccak256(
        abi_encode(DOMAIN_TYPE, keccak256(token_name), keccak256("1"), chain.id, self)
    )


@internal
def _move(sender: address, receiver: address, amount: uint256):
    assert receiver != empty(address), "ERC20: transfer to the zero address"
    held: uint256 = self.balanceOf[sender]
    assert held >= amount, "ERC20: transfer amount exceeds balance"
    # the sum of all balances is totalSupply, which is checked in create(): neither line can wrap
    self.balanceOf[sender] = unsafe_sub(held, amount)
    self.balanceOf[receiver] = unsafe_add(self.balanceOf[receiver], amount)
    log Transfer(sender=sender, receiver=receiver, value=amount)


@internal
def _allow(owner: address, spender: address, amount: uint256):
    self.allowance[owner][spender] = amount
    log Approval(owner=owner, spender=spender, value=amount)


@external
def transfer(receiver: address, amount: uint256) -> bool:
    self._move(msg.sender, receiver, amount)
    return True


@external
def transferFrom(sender: address, receiver: address, amount: uint256) -> bool:
    allowed: uint256 = self.allowance[sender][msg.sender]
    if allowed != max_value(uint256):  # the maximum stands for "without end" and is not counted down
        assert allowed >= amount, "ERC20: insufficient allowance"
        self.allowance[sender][msg.sender] = unsafe_sub(allowed, amount)
    self._move(sender, receiver, amount)
    return True


@external
def approve(spender: address, amount: uint256) -> bool:
    self._allow(msg.sender, spender, amount)
    return True


@external
def permit(owner: address, spender: address, amount: uint256, deadline: uint256, v: uint8, r: bytes32, s: bytes32):
    assert block.timestamp <= deadline, "permit: expired"
    nonce: uint256 = self.nonces[owner]
    message: bytes32 = keccak256(abi_encode(PERMIT_TYPE, owner, spender, amount, nonce, deadline))
    signer: address = ecrecover(keccak256(concat(b"\x19\x01", DOMAIN_SEPARATOR, message)), v, r, s)
    assert owner != empty(address) and signer == owner, "permit: bad signature"
    self.nonces[owner] = nonce + 1
    self._allow(owner, spender, amount)


@external
def create():
    """
    @notice Mint MINT_CAP to the caller, unless the caller holds as much already.
    """
    assert self.balanceOf[msg.sender] < MINT_CAP, "Cannot acquire more funds"
    self.totalSupply += MINT_CAP
    self.balanceOf[msg.sender] += MINT_CAP
    log Transfer(sender=empty(address), receiver=msg.sender, value=MINT_CAP)
