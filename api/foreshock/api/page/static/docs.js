// Lays out the description of the service with Swagger UI, which comes from this service like all else.

const message = document.getElementById("docs-message");

function say(text, href, label) {
  const link = document.createElement("a");
  link.href = href;
  link.textContent = label;
  message.replaceChildren(`${text} `, link);
}

async function description() {
  const response = await fetch("/api/v1/openapi.json", { cache: "no-cache" });
  if (response.status === 401 || response.status === 403) say("This service asks for a token:", "/", "sign in, then come back");
  else if (!response.ok) say(`The service answered ${response.status}.`, "/docs", "Try again");
  else return response.json();
  return null;
}

const spec = await description().catch(() => say("The service does not answer.", "/docs", "Try again"));
if (spec) {
  // validatorUrl would send the address of the description to somebody else.
  window.SwaggerUIBundle({ spec, domNode: document.getElementById("docs"), deepLinking: true, validatorUrl: null, docExpansion: "list" });
}
