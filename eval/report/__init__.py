"""One self-contained HTML page about a run, from its ledger and its configuration alone."""

if __name__ != "millrace.eval.report":
    raise ImportError(
        f"import millrace.eval.report, not {__name__}: a bare import would load a second copy with a second registry"
    )

from millrace.eval.report.page import write_report

__all__ = ["write_report"]
