"""A mask of your own from a function of indices, and from a graph; drawn, explained, and checked against torch."""

import torch
from torch import Tensor

import anymask

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
batch, heads, length, dim = 2, 4, 512, 64

# a function: nearby tokens, and every token whose number shares a bit with the query's
codes = torch.randint(1, 2**6, (batch, length), device=device)


def related(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """FlexAttention's form: a bool for one pair, called for all pairs of a tile at once."""
    near = (q - k).abs() <= 8 * (h + 1)
    return near | ((codes[b, q] & codes[b, k]) == 1)


mask = anymask.from_function(related, batch=batch, heads=heads)
packed = anymask.pack(mask & anymask.causal(), q_len=length, kv_len=length, device=device)

# a graph: nodes attend to their neighbours, here by a tensor of pairs
edges = torch.randint(0, length, (2, 4000), device=device)
adjacency = torch.eye(length, dtype=torch.bool, device=device)
adjacency[edges[0], edges[1]] = True
graph = anymask.pack(adjacency)

q, k, v = (torch.randn(batch, heads, length, dim, device=device, requires_grad=True) for _ in range(3))
for name, m in (("function", packed), ("graph", graph)):
    print(f"{name}\n{anymask.explain(q, k, v, m)}")
    o = anymask.attention(q, k, v, m)
    gradients = torch.autograd.grad(o.square().sum(), (q, k, v))
    torch_o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m.to_dense())
    expected = torch.autograd.grad(torch_o.square().sum(), (q, k, v))
    for what, x, y in zip(("o", "dq", "dk", "dv"), (o, *gradients), (torch_o, *expected), strict=True):
        print(f"  {what}: largest difference to torch {(x - y).abs().max():.1e} of {y.abs().max():.1f}")
