"""From a video file to the pixels of a clip."""
