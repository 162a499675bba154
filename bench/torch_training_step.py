"""The training step of kvcull-train in PyTorch, to be compared with: the same model, gates, losses and optimiser,
with attention and capacity over whole T x T matrices, as one writes it first.

    python3 bench/torch_training_step.py [--length 256] [--batch 2] [--steps 30] [--threads 2]
    kvcull-train --steps 30 --every 30 --threads 2

Any PyTorch from 1.13 on. Processor time, of all threads, is what to compare on a machine that does other things.
"""
import argparse, json, math, statistics, struct, time
from pathlib import Path

import torch
import torch.nn.functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "examples/tiny_llama/model")
for name, default in (("length", 256), ("batch", 2), ("steps", 30), ("threads", 2), ("width", 32), ("budget", 48)):
    parser.add_argument("--" + name, type=int, default=default)
options = parser.parse_args()
torch.set_num_threads(options.threads)
torch.manual_seed(1)

config = json.loads((options.model / "config.json").read_text())
file = (options.model / "model.safetensors").read_bytes()
size = struct.unpack("<Q", file[:8])[0]
weights = {}
for name, tensor in json.loads(file[8 : 8 + size]).items():
    if name == "__metadata__":
        continue
    assert tensor["dtype"] == "F16"
    begin, end = (8 + size + at for at in tensor["data_offsets"])
    weights[name] = torch.frombuffer(bytearray(file[begin:end]), dtype=torch.float16).view(tensor["shape"]).float()

layers, hidden = config["num_hidden_layers"], config["hidden_size"]
q_heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
length, batch = options.length, options.batch
angle = torch.arange(length)[:, None] * config["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
cosine, sine = angle.cos().float(), angle.sin().float()
age = torch.arange(length)[:, None] - torch.arange(length)[None, :]
future = age < 0
age = age.clamp(min=0).float()


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def rope(x):
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(hidden, options.width), torch.nn.Linear(options.width, kv_heads)
        for linear, bias in ((self.hidden, 0.0), (self.out, math.log(50 * length))):
            torch.nn.init.normal_(linear.weight, std=0.1)
            torch.nn.init.constant_(linear.bias, bias)

    def forward(self, x):  # [batch, kv_heads, T]
        return F.logsigmoid(self.out(F.silu(self.hidden(x)))).transpose(1, 2)


gates = torch.nn.ModuleList(Gate() for _ in range(layers))


def model(tokens, gated):
    x = weights["model.embed_tokens.weight"][tokens]
    rates = []
    for i in range(layers):
        weight = lambda name: weights[f"model.layers.{i}.{name}.weight"]
        e = norm(x, weight("input_layernorm"))
        heads = lambda name, count: (e @ weight(f"self_attn.{name}_proj").T).view(batch, length, count, dim).transpose(1, 2)
        q, k, v = rope(heads("q", q_heads)), rope(heads("k", kv_heads)), heads("v", kv_heads)
        k, v = k.repeat_interleave(q_heads // kv_heads, 1), v.repeat_interleave(q_heads // kv_heads, 1)
        logits = q @ k.transpose(2, 3) / math.sqrt(dim)
        if gated:
            rates.append(gates[i](e))
            logits = logits + age * rates[-1].repeat_interleave(q_heads // kv_heads, 1)[:, :, None, :]
        o = logits.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + o.transpose(1, 2).reshape(batch, length, q_heads * dim) @ weight("self_attn.o_proj").T
        e = norm(x, weight("post_attention_layernorm"))
        x = x + (F.silu(e @ weight("mlp.gate_proj").T) * (e @ weight("mlp.up_proj").T)) @ weight("mlp.down_proj").T
    logits = norm(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
    return logits.log_softmax(-1), rates


optimiser = torch.optim.AdamW(gates.parameters(), lr=5e-3, weight_decay=1e-5)


def step():
    tokens = torch.randint(8, config["vocab_size"], (batch, length))
    with torch.no_grad():
        teacher, _ = model(tokens, False)
    student, rates = model(tokens, True)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    ntp = F.nll_loss(student[:, :-1].reshape(-1, student.shape[-1]), tokens[:, 1:].reshape(-1))
    size = (age * torch.stack(rates)[..., None, :]).exp().masked_fill(future, 0).sum(-1)
    excess = (size - options.budget).clamp(min=0) / (torch.arange(length) - options.budget).clamp(min=1)
    capacity = excess.sum() / (excess > 0).sum().clamp(min=1)
    optimiser.zero_grad()
    ((kl + ntp) / 2 + capacity).backward()
    torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
    optimiser.step()


for _ in range(5):
    step()
wall, busy = [], []
for _ in range(options.steps):
    begin, busy_begin = time.perf_counter(), time.process_time()
    step()
    wall.append(1e3 * (time.perf_counter() - begin))
    busy.append(1e3 * (time.process_time() - busy_begin))
print(f"torch {torch.__version__}, {options.threads} threads, {batch} documents of {length} tokens: "
      f"{statistics.median(wall):.1f} ms per step, processor time {statistics.median(busy):.1f} ms (best {min(busy):.1f})")
