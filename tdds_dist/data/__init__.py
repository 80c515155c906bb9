"""Images to `.beton` files to batches.

Owns sources of images, writing and checking `.beton` files and their manifests, and the loader that
yields (image, label, global index). The only room that imports FFCV. May import `runs`,
`distributed` and the ground. Start with `loader`.
"""

# that other rooms may import
__all__ = ["beton", "check", "corruptions", "loader", "manifest", "pixels", "sources", "writer"]
