"""Readers of text in images: EasyOCR and RapidOCR behind one base class."""
