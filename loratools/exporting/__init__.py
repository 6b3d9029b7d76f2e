"""ONNX: models traced, adapters folded into graphs, switched in graphs, kept in graphs."""
