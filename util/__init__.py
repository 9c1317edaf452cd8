"""Parts shared by the training scripts; see the file tree in README.md."""
