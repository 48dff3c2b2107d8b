"""Adapters as folders that PEFT loads over a model of Hugging Face, and back."""

from convert.peft.export import Written as Written
from convert.peft.export import bare as bare
from convert.peft.export import write as write
from convert.peft.export import write_stack as write_stack
from convert.peft.importing import Imported as Imported
from convert.peft.importing import load as load
from convert.peft.importing import read as read
