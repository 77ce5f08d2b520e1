"""The model card of a written folder.

metadata         a card split into YAML metadata and text
loading_code     the lines that load the model
figure           the figure, as SVG
text             the text of the section on the pruning
shrunken_text    the text of the section of a smaller model
shrunken_figure  its figure, as SVG
card             the source's card below that section
"""
