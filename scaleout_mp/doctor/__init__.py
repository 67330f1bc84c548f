"""What `scaleout-mp doctor` finds out: what this machine offers for confining tasks, and what a task meets there."""
