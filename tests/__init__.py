"""A package, since other projects install one of this name, which would be found first."""
