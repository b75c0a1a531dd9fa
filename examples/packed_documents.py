"""A language model on packed documents: each sees itself alone, and the loss is that of documents one by one."""

import torch
from torch import Tensor, nn

import anymask

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


class Layer(nn.Module):
    """Attention and a small network, with residuals."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: anymask.BlockMask) -> Tensor:
        """x `[batch, length, dim]`."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(anymask.attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


documents = [torch.randint(0, 50, (n,)) for n in (90, 35, 140, 60, 75)]
tokens = torch.cat(documents)[None].to(device)
ids = torch.repeat_interleave(torch.arange(5), torch.tensor([len(d) for d in documents]))[None].to(device)
positions = torch.cat([torch.arange(len(d)) for d in documents]).to(device)

# packed once, and read by every layer and by the backward pass
mask = anymask.pack(
    anymask.causal() & anymask.document(ids), q_len=tokens.shape[1], kv_len=tokens.shape[1], device=device
)
print(mask)

embed, place = nn.Embedding(50, 64).to(device), nn.Embedding(150, 64).to(device)
layers, head = nn.ModuleList(Layer(64, 4) for _ in range(2)).to(device), nn.Linear(64, 50).to(device)
parameters = [p for m in (embed, place, layers, head) for p in m.parameters()]
optimiser = torch.optim.AdamW(parameters, 3e-3)
last = ids[:, 1:] != ids[:, :-1]
for step in range(30):
    x = embed(tokens) + place(positions)
    for layer in layers:
        x = layer(x, mask)
    # the last token of a document has no next one
    targets = tokens[:, 1:].masked_fill(last, -100)
    loss = nn.functional.cross_entropy(head(x[:, :-1]).flatten(0, 1), targets.flatten())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step % 10 == 9:
        print(f"step {step + 1}: {loss.item():.3f} nats per token")
