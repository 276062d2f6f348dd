"""Checkpoints: their files, what is kept of a rank, the thread that writes, who shares a disk, what a resumed run takes up."""
