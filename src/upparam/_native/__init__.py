"""The optional compiled kernel. Absent when the package was installed without a compiler; everything then runs on numpy."""
