"""The page at /ui: one HTML file, one style sheet, ES modules. No framework, no build step, works offline.

Owns how the page looks and behaves. Must not know anything but the feed of `seallmd.api.ui`, which serves it,
and OpenAI's API for its chat.
"""
