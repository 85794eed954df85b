"""The only place where users' pictures, PDFs and texts come in.

`images` opens pictures, `modes` makes them RGB, `arrays` takes them from NumPy, `pdf` renders pages in a
child process, `text` decodes and `split` cuts texts, `folder` finds and reads files, `files` turns a file
into items, `roots` says which files a stored path may open; `jpeg` is the way out, to chat models. What
can't be embedded raises an `ItemError` with a code; nothing is embedded in its place. Imports no torch.
"""
