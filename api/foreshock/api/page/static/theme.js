// A classic script, so that it runs before anything is drawn: the theme that this browser was told to use.
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("foreshock-theme");
  } catch {
    // storage may be forbidden; then the system's preference holds
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
