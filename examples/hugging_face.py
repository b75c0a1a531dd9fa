"""A model of Hugging Face transformers on packed documents: one line registers anymask, one word chooses it.

Needs transformers 5: `pip install 'transformers>=5'`. Nothing is downloaded: the model is made of a configuration.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anymask.integrations.transformers import register

register()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
# from_pretrained(..., attn_implementation="anymask") is the same for a model with weights
model = LlamaForCausalLM._from_config(config, attn_implementation="anymask").to(device)

# three documents in a row; places that begin again tell where
lengths = [200, 90, 110]
tokens = torch.randint(0, 512, (1, sum(lengths)), device=device)
positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)

model.eval()
with torch.no_grad():
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    alone = [model(part).logits for part in tokens.split(lengths, dim=1)]
difference = (packed - torch.cat(alone, 1)).abs().max().item()
print(f"packed and one by one: logits differ by {difference:.1e}")
assert difference < (1e-4 if device == "cpu" else 5e-2)

model.train()
optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
for step in range(10):
    loss = model(tokens, position_ids=positions, labels=tokens, use_cache=False).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}")
