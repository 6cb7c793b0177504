"""The structures: one small file each."""
