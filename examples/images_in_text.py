"""Prefix-LM and images: a prompt and each image attend both ways, the text around them is causal."""

import torch

import anymask

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
batch, heads, length, dim = 2, 4, 400, 64

# where the image of each token begins and ends; 0 and 0 for text
start, end = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.long)
images = [[(40, 110), (200, 270)], [(10, 150)]]
for sample, spans in enumerate(images):
    for first, stop in spans:
        start[sample, first:stop], end[sample, first:stop] = first, stop
prompt = torch.tensor([20, 5])
lengths = torch.tensor([400, 330])

mask = anymask.prefix_lm(prompt) | anymask.spans(start, end)
mask = mask & anymask.key_padding(lengths)
packed = anymask.pack(mask.to(device), q_len=length, kv_len=length, device=device)

q, k, v = (torch.randn(batch, heads, length, dim, device=device, requires_grad=True) for _ in range(3))
print(anymask.explain(q, k, v, packed))
o = anymask.attention(q, k, v, packed)
o.square().mean().backward()

# an image's first token sees its last, and text does not see what follows
dense = packed.to_dense()[:, 0]
assert dense[0, 40, 109]
assert not dense[0, 39, 40]
assert not dense[1, :, 330:].any()
# the same by torch, with every pair in memory
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=packed.to_dense())
print(f"largest difference to torch: {(o - expected).abs().max():.1e}")
