"""Imported by the fork server. Captures a model once, which triggers the late imports of torch and transformers."""

import torch
from transformers import LlamaConfig

from irc.model.capture import capture

torch.set_num_threads(1)  # threads do not survive a fork
capture(
    LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
    torch.float32,
)
