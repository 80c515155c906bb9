"""Doors into other people's training loops: score every sample of a training that another library
runs, by one line.

`recorder` holds what any such loop needs beside the scorer; a module per library
(`hugging_face`, `lightning`, `timm`) says where in it a sample's index, logits and label are;
`rows` is for samples of several labels or tokens. May import `scoring` and below. Start with
`recorder`.
"""

__all__ = ["hugging_face", "lightning", "recorder", "rows", "timm"]
