"""A package, since others bring a package of this name along (torch-fidelity does) that would be found first."""
