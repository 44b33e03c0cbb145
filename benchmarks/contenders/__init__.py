"""The contenders: whatever takes and gives back a lock, each in a process of its own, all told the same commands."""
