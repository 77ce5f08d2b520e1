"""The model card of a written folder.

metadata      YAML metadata and text, apart
loading_code  the lines that load the model
figure        the figure, as SVG
text          what the card says
card          the source's card with ours on top
"""
