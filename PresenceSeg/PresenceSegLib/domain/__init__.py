"""What a case, a project and a model are: plain Python that runs anywhere, in Slicer and outside."""
