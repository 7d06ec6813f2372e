"""ReLoRA in a training loop of twenty lines: no trainer and no configuration file."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peptrain as pt
from peptrain.data import default_corpus

STEPS, ROWS, LENGTH = 60, 16, 128

torch.manual_seed(0)
corpus = default_corpus()
shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=corpus.vocab_size, **shape, num_attention_heads=4))
training = pt.adapt(model, pt.ReLoRA(rank=32), steps=STEPS, fresh=True)

for step in range(STEPS):
    ids = corpus.batch(seed=0, step=step, rank=0, world=1, batch_size=ROWS, seq_len=LENGTH)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    done = training.step()
    if step % 10 == 0 or "merges" in done:
        print(f"step {step + 1:3d}  loss {loss.item():.3f}  lr {done['lr']:.1e}")

training.dense().save_pretrained("plain-loop-model")
