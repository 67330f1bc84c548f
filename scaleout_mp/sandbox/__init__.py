"""What confines a task and what finds and kills its processes. Standard library only; used on both sides."""
