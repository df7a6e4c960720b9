"""Where models and data sets come from: hubs, wheels and folders, through one content-addressed cache."""
