"""One file per library: `open_stream(job, state)` gives a `peers.job.Stream`."""
