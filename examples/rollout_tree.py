"""A tree of samples for reinforcement learning: answers that share a prompt are computed with it once."""

import torch

import anymask

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
heads, dim, prompt, answer, answers = 4, 64, 120, 40, 8

# each token's parent: a chain for the prompt, and a chain from its end for each answer
length = prompt + answers * answer
parents = torch.arange(-1, length - 1)
parents[prompt::answer] = prompt - 1
places = torch.cat([torch.arange(prompt), torch.arange(prompt, prompt + answer).repeat(answers)])
print(f"{length} tokens instead of {answers * (prompt + answer)}")

mask = anymask.pack(anymask.tree(parents), q_len=length, kv_len=length, device=device)
print(mask)

q, k, v = (torch.randn(1, heads, length, dim, device=device, requires_grad=True) for _ in range(3))
o, lse = anymask.attention(q, k, v, mask, return_lse=True)
advantages = torch.randn(answers, device=device).repeat_interleave(answer)
(o[:, :, prompt:].mean((1, 3)) * advantages).sum().backward()

# every answer is what it is alone, behind the prompt
for i in range(answers):
    own = torch.cat([torch.arange(prompt), prompt + i * answer + torch.arange(answer)]).to(device)
    alone = anymask.attention(q[:, :, own], k[:, :, own], v[:, :, own], is_causal=True)
    difference = (o[:, :, own] - alone).abs().max().item()
    assert difference < (1e-5 if device == "cpu" else 1e-2), difference
print(f"answers agree with themselves alone; places of tokens run to {int(places.max())}")
