"""A conversation → token ids and pixels: messages, pictures, video, the chat template, and the tests of a template."""
