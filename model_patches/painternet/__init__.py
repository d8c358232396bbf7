"""PainterNet: a control branch beside the UNet, with layer points and attention control points."""
