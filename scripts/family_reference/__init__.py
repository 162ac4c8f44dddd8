"""What `make_family_reference.py` records: the cases, and how a model is measured."""
