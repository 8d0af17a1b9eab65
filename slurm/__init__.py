"""Batch jobs: rendering and submission."""

if __name__ != "millrace.slurm":
    raise ImportError(f"import millrace.slurm, not {__name__}: a bare import would load a second copy of the package")
