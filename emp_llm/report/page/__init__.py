"""A report as one page for a browser and as figures for a paper.

colours        one colour ramp for all figures
content        every number and word that is shown
page           HTML, style and script in one file
paper_figures  figures drawn by matplotlib
"""
