"""A dense model becomes a routed one: checkpoint, capture, modules, the rewritten graph as a transformers model."""
