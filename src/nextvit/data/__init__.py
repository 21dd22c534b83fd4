"""Images and labels: safe decoding, preprocessing, folders of class folders, and the images that ship here."""
