// A classic script in the head: the chosen theme and language hold before anything is drawn.
{
  const stored = (name) => {
    try {
      return JSON.parse(localStorage.getItem(`danlu.${name}`));
    } catch {
      return null;
    }
  };
  const theme = stored("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  const language = stored("language") ?? navigator.language;
  document.documentElement.lang = language.startsWith("zh") ? "zh-CN" : "en";
}
