"""Best Start: of several noises, the one whose first steps the attention finds best goes on."""
