"""`stepladder profile`: where the time of a step or of a kernel goes."""
