/**
 * Server-sent events of a response's body, as the HTML standard reads them (9.2.6). EventSource itself cannot send a body.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {{event: string, data: string}}
 */
export async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return; // an event without the empty line that ends it is not whole
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a CR at the very end may be half of a CR LF
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event: event || "message", data: data.join("\n") };
          event = "";
          data = [];
          continue;
        }
        const [, field, content] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
        if (field === "data") data.push(content ?? "");
        else if (field === "event") event = content ?? "";
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a broken stream cannot be cancelled, and need not be
  }
}
