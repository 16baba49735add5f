"""What leaves the library."""

from .lora import ExportReport, export_lora

__all__ = ["ExportReport", "export_lora"]
