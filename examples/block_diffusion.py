"""Block diffusion: one pass trains all blocks, noisy and clean, and sampling goes block by block over a cache."""

import torch

import anymask

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
heads, dim, block, length = 4, 64, 32, 256

# training: noisy tokens, then the same ones clean
mask = anymask.pack(anymask.block_diffusion(block, length), q_len=2 * length, kv_len=2 * length, device=device)
print(mask)
q, k, v = (torch.randn(2, heads, 2 * length, dim, device=device, requires_grad=True) for _ in range(3))
o = anymask.attention(q, k, v, mask)
o[:, :, :length].square().mean().backward()
assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))

# sampling: the queries of one block over the keys so far
q, k, v = (t.detach()[:, :, length:] for t in (q, k, v))
whole = anymask.pack(anymask.block_diffusion(block), q_len=length, kv_len=length, device=device)
together = anymask.attention(q, k, v, whole)
for start in range(0, length, block):
    stop = start + block
    # nothing is evaluated again for the rows of a packed mask
    rows = anymask.slice_queries(whole, start, stop)
    step = anymask.attention(q[:, :, start:stop], k, v, rows)
    # a block sees itself and the blocks before it: keys so far are enough, without a mask
    so_far = anymask.attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
    for found in (step, so_far):
        assert (found - together[:, :, start:stop]).abs().max() < (1e-5 if device == "cpu" else 1e-2)
print(f"{length // block} blocks of {block} tokens: step by step as all at once")
