"""The Hub: what is read from it and what is published there; the only import of its library."""
