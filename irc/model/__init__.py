"""Turns a dense model into a routed one: checkpoint, capture, modules, the rewritten graph in transformers' form."""
