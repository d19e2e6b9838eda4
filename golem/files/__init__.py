"""gftp: files that nodes serve to one another, and how agents publish and fetch them."""
