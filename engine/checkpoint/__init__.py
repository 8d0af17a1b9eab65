"""Checkpoints: flat slices in safetensors, committed by rename, verified before load."""

if __name__ != "millrace.engine.checkpoint":
    raise ImportError(f"import millrace.engine.checkpoint, not {__name__}: a bare import would load a second copy")
